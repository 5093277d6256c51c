drop table queue_pauses;
