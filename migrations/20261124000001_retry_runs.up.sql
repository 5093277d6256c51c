-- Runs that failed can go on, and any run can be played again.

-- A failed run may be taken up again; every other end stays.
drop trigger runs_transitions on runs;
create trigger runs_transitions before update on runs for each row
    when (
        old.status in ('completed', 'cancelled')
        or (old.status = 'failed' and new.status not in ('running', 'suspended'))
        or (new.status = 'queued' and old.status <> 'queued')
        or (new.status = 'completed' and old.status <> 'running')
    )
    execute function refuse_transition();

-- The run that this one plays again.
alter table runs add column replay_of uuid;

-- A gate that was refused is asked for again when its run is retried: one open
-- gate a step, and those before it kept.
alter table approvals drop constraint approvals_gate;
create unique index approvals_gate on approvals (run_id, step) where status = 'pending';
create index approvals_run on approvals (run_id, step);

-- What gave up, by what it was about: gone when that is retried.
create index dead_letters_ref on dead_letters (company_id, ref_id);
