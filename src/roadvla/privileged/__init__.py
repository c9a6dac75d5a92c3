"""What a teacher is told and a student is not (Sec. 4.2.1): simulator state and past successes."""
