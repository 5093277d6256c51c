drop index approvals_of_calls;
-- One question a step: of the others nobody decides any more.
update approvals a set status = 'cancelled', decided_at = clock_timestamp(), decided_by = 'system'
where a.status = 'pending' and exists (
    select from approvals b where b.run_id = a.run_id and b.step = a.step and b.status = 'pending' and b.id < a.id
);
drop index approvals_gate;
create unique index approvals_gate on approvals (run_id, step) where status = 'pending';
