"""What an evaluation produces: answers, scores, and the report."""
