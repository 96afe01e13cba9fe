"""Files and directories: run directories with a manifest, outputs that appear whole, JSON that is checked."""
