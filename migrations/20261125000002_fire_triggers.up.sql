-- What starts runs of a playbook by itself: the clock, events. A row stands beside
-- the playbook's current version; `playbooks.triggers_of` names the version for
-- which it was made, and workers see to those that lag behind.
create table triggers (
    company_id uuid not null,
    playbook_id uuid not null,
    kind text not null check (kind in ('schedule', 'event', 'webhook')),
    event text,
    -- The schedule for which next_at was computed: an edit that leaves it alone
    -- leaves the next fire alone.
    spec jsonb,
    -- The planned time of the next fire; a job is due then.
    next_at timestamptz,
    last_at timestamptz,
    primary key (company_id, playbook_id),
    constraint triggers_schedule check ((kind = 'schedule') = (spec is not null and next_at is not null)),
    constraint triggers_event check ((kind = 'schedule') = (event is null))
);
create index triggers_by_event on triggers (company_id, kind, event, playbook_id) where event is not null;

alter table playbooks add column triggers_of uuid;
create index playbooks_lagging on playbooks (company_id, id) where triggers_of is distinct from current_version_id;

-- The same fire, event or key starts one run.
alter table runs add column dedup_key text;
create unique index runs_dedup on runs (playbook_id, dedup_key) where dedup_key is not null;

grant select, insert, update, delete on triggers to capx_api, capx_system;
alter table triggers enable row level security;
alter table triggers force row level security;
create policy everything on triggers to capx_system using (true) with check (true);
create policy tenant on triggers to capx_api
    using (exists (select from companies c where c.id = triggers.company_id));
