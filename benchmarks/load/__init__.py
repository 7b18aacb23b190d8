"""Load on OpenAI-compatible servers: schedules, a light client, figures."""
