"""The app. `main` starts it, `views` are its pages, `figures` are pure. Numbers and files are in `analysis`."""
