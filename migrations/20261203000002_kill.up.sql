-- Since when nothing of it may go on, calls that are under way included; agents say so in
-- `paused_by`.
alter table companies add column killed_at timestamptz;
alter table playbooks add column killed_at timestamptz;
