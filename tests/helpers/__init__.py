"""What several test files, and the script that writes docs/compatibility.md, share."""
