drop index jobs_low, jobs_high;
drop table redrives, pauses, queue_counts, retention, upkeep;
