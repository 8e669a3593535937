"""Programs that tests start under a launcher."""
