"""A worker's side of the store: publishes prefixes in the background, fetches what pays."""
