"""What people say of generated videos: asking them on a local web page, and using what they said."""
