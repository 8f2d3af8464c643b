"""What everything else rests on and that knows nothing of models: errors, options, files, artifacts, progress."""
