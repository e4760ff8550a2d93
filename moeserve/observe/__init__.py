"""What is shown to people: metrics, one record per thing, the page."""
