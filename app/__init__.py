"""The app. `main` starts it, `screens` are its pages, `figures` are pure. Numbers and files are in `analysis`."""
