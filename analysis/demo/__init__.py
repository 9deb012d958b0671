"""What the app opens with: presets that were found by a stated search, and results bundled with the program."""
