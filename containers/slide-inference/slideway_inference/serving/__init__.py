"""The `serve` entry: packs of tiles in over HTTP, a JSON line a tile out."""
