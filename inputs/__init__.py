"""What goes in: rows, images, prompts, hold-out, and features kept between epochs."""
