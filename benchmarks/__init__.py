"""What was measured, one file a question; a package, so that no installed one of this name takes its place."""
