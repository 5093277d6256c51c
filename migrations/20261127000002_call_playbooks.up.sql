-- Steps that are done by a run of another playbook. The job of the step waits, and
-- is woken by whatever ends that run.
alter table runs add column called boolean not null default false;
-- How many runs above it wait for it.
alter table runs add column depth smallint not null default 0;

create table run_children (
    company_id uuid not null,
    run_id uuid not null,
    step integer not null,
    -- The place in the list of a step that is done for one, else -1.
    item integer not null,
    -- How often the run had jumped.
    round integer not null,
    -- The attempt that has begun it, or let it go on; 0 where a retry begins anew.
    attempt integer not null,
    -- The job that waits.
    job_id bigint not null,
    child_id uuid not null,
    primary key (company_id, run_id, step, item, round, child_id)
);
create index run_children_child on run_children (child_id);
grant select, insert, update, delete on run_children to capx_api, capx_system;
alter table run_children enable row level security;
alter table run_children force row level security;
create policy everything on run_children to capx_system using (true) with check (true);
create policy tenant on run_children to capx_api
    using (exists (select from companies c where c.id = run_children.company_id));

-- Whoever has the waiting job in hand loses it, without a try. It may be about
-- something else by now.
create function wake_caller() returns trigger language plpgsql as $$
begin
    update jobs j
    set state = 'ready', due_at = now(), lease_epoch = j.lease_epoch + 1, session_id = null, deadline_at = null,
        attempt = case when j.state = 'running' then greatest(j.attempt - 1, 0) else j.attempt end,
        -- What a suspect was charged with before it began is taken back.
        crash_count = least(j.crash_count, 2)
    from run_children c
    where c.child_id = new.id and j.id = c.job_id and j.ref_id = c.run_id and j.step = c.step
        and coalesce(j.item, -1) = c.item;
    return null;
end $$;
create trigger runs_wake_caller after update of status on runs for each row
    when (new.called and new.status in ('completed', 'failed', 'cancelled') and old.status is distinct from new.status)
    execute function wake_caller();
