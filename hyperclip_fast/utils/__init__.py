"""What every other folder may use; nothing here imports anything of ours."""
