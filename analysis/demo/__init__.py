"""The app's opening content: presets found by a stated search, and results bundled with the program."""
