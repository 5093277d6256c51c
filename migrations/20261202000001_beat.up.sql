-- Agents beat by a job each, work on their tasks by runs of playbooks that are capx's own,
-- and write to each other.
alter table playbooks add column builtin boolean not null default false;

alter table agents
    -- The beat that is planned, or under way: later ones are counted from it.
    add column beat_at timestamptz,
    -- Since when one is under way,
    add column beat_began_at timestamptz,
    -- why,
    add column beat_reasons jsonb not null default '[]',
    -- by which run now,
    add column beat_run uuid,
    -- and what of it is done.
    add column beat_items integer not null default 0,
    add column beat_actions integer not null default 0,
    add column beat_cost_nanos bigint not null default 0,
    -- Why the next one is to come at once.
    add column wakes jsonb not null default '[]';

alter table tasks
    -- What must be completed before.
    add column needs uuid[] not null default '{}',
    -- Who has made it, where it was an agent.
    add column created_by uuid;
create index tasks_of_run on tasks (run_id) where run_id is not null and status = 'in_progress';
create index tasks_needed on tasks using gin (needs) where needs <> '{}' and status = 'pending';

-- The agent whose beat a run belongs to: it is told when the run is over or waits.
alter table runs add column beat_of uuid;

create table messages (
    company_id uuid not null,
    id uuid not null,
    -- To whom; nobody, where it is for people alone.
    to_agent uuid,
    channel text,
    -- From whom: an agent, or a person.
    from_agent uuid,
    body text not null check (octet_length(body) <= 65536),
    run_id uuid,
    created_at timestamptz not null default now(),
    read_at timestamptz,
    primary key (company_id, id)
);
create index messages_unread on messages (company_id, to_agent, id) where read_at is null and to_agent is not null;
grant select, insert, update, delete on messages to capx_api, capx_system;
alter table messages enable row level security;
alter table messages force row level security;
create policy everything on messages to capx_system using (true) with check (true);
create policy tenant on messages to capx_api
    using (exists (select from companies c where c.id = messages.company_id));

-- The beat's job waits for the run. Whoever has it in hand looks again after this: a
-- heartbeat's step counts how often it was woken.
create function tell_agent() returns trigger language plpgsql as $$
begin
    update jobs j
    set step = j.step + 1,
        state = case j.state when 'scheduled' then 'ready' else j.state end,
        due_at = case j.state when 'scheduled' then now() else j.due_at end
    where j.company_id = new.company_id and j.unique_key = 'heartbeat:' || new.beat_of;
    return null;
end $$;
create trigger runs_tell_agent after update of status on runs for each row
    when (
        new.beat_of is not null and new.status in ('suspended', 'completed', 'failed', 'cancelled')
        and old.status is distinct from new.status
    )
    execute function tell_agent();

-- Agents that are there already begin to beat.
delete from jobs where kind = 'heartbeat' and state <> 'running';
update agents set beat_at = now() where status not in ('removed', 'initializing');
insert into jobs (queue, kind, company_id, ref_id, state, due_at, unique_key)
select 'system', 'heartbeat', company_id, id, 'scheduled', now() + random() * interval '300 seconds', 'heartbeat:' || id
from agents where status not in ('removed', 'initializing')
on conflict (company_id, unique_key) where unique_key is not null do nothing;
