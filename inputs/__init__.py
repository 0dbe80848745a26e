"""What goes into training: rows, images, prompts, hold-out, and vision features kept between epochs."""
