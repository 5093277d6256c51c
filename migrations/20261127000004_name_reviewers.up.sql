-- Who may decide about a gate: keys by their names or ids; anybody without.
alter table approvals add column reviewers text[];
-- Nobody had decided in time, and anybody may now.
alter table approvals add column escalated_at timestamptz;
