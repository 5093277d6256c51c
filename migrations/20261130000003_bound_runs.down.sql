alter table run_steps drop column bytes;
alter table run_fans drop column bytes;
alter table runs drop column bytes;
