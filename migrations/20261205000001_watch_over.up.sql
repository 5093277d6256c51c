-- Providers that take nothing for a while, from anybody with the same key: by a digest of key
-- and address, and the model.
create table provider_gates (
    gate text primary key,
    closed_until timestamptz not null,
    -- One call tries whether it is open again, until then.
    probe_until timestamptz,
    reason text not null
);
grant select, insert, update, delete on provider_gates to capx_system;

-- What changed in the last beat that has cost something, and how often in a row it was the same.
alter table agents
    add column beat_digest bytea,
    add column beat_repeats integer not null default 0;

-- The directive that a task serves: its money is counted together.
alter table tasks add column root_id uuid;
create index tasks_root on tasks (company_id, root_id) where root_id is not null;
alter table budgets drop constraint budgets_scope_check;
alter table budgets add constraint budgets_scope_check
    check (scope in ('company', 'agent', 'directive', 'playbook', 'run', 'step'));

-- What was decided and done, a chain for each company: each row's hash is over the one before,
-- so that nothing in the middle can be changed, left out or put in unseen.
create table audit (
    company_id uuid not null,
    seq bigint not null,
    at timestamptz not null,
    kind text not null,
    actor text not null,
    -- As it was hashed.
    data text not null,
    prev bytea not null,
    hash bytea not null,
    primary key (company_id, seq)
);
create table audit_heads (
    company_id uuid primary key,
    seq bigint not null,
    hash bytea not null
);
grant select, insert on audit to capx_api, capx_system;
grant select, insert, update on audit_heads to capx_api, capx_system;
alter table audit enable row level security;
alter table audit force row level security;
create policy everything on audit to capx_system using (true) with check (true);
create policy tenant on audit to capx_api
    using (exists (select from companies c where c.id = audit.company_id));
alter table audit_heads enable row level security;
alter table audit_heads force row level security;
create policy everything on audit_heads to capx_system using (true) with check (true);
create policy tenant on audit_heads to capx_api
    using (exists (select from companies c where c.id = audit_heads.company_id));
