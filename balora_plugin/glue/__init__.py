"""The paper's GLUE and GLUE-X protocol: tasks, data, scores, recipes, runs and their table. See docs/glue.md."""
