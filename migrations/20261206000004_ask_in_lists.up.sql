-- Of the items of a list more than one may wait for a person's word about its calls.
drop index approvals_gate;
create unique index approvals_gate on approvals (run_id, step, coalesce(call_key, '')) where status = 'pending';
-- Those whose runs may end without them.
create index approvals_of_calls on approvals (company_id) where status = 'pending' and call_key is not null;
