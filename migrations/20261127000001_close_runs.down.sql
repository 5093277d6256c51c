alter table runs drop column closings;
alter table runs drop column ending;
