drop table signals_taken;
drop table waits;
drop table signals;
