alter table run_items drop column bytes;
alter table run_fans drop column last_lane, drop column first_lane;
