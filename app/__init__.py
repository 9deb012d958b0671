"""The app. `main` starts it, `views` are its pages, `figures` are pure. What a test could check is in `analysis`."""
