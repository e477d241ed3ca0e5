"""What a run is told: settings, presets, files, and checks of them."""
