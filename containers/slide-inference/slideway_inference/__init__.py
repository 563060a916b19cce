"""Runs tile models over whole-slide images: SageMaker's side of Slideway."""
