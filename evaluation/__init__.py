"""What an evaluation makes: answers, scores, and the report."""
