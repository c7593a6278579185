"""What a server did, step by step: records, file, replay by other policies, summary and tuning."""
