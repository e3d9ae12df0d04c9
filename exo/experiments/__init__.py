"""The paper's experiments: recipes, plans, tasks and the quickstart."""
