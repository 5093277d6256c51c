drop index approvals_gate;
create unique index approvals_gate on approvals (run_id, step) where status = 'pending';
