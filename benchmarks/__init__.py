"""What was measured, one file per question; a package, so that no installed package of this name takes its place."""
