-- What a run comes to once it is closed: its steps are over, and what undoes them or
-- is done in any case is not. Kept when it has ended.
alter table runs add column ending jsonb;
-- How often it was closed before and went on after all, by a retry: what is done
-- again then are other effects.
alter table runs add column closings integer not null default 0;
