-- A person's word about single calls of tools, by the company's policy.
alter table approvals
    -- The call in the journal that it is about; nothing, where it is about a step.
    add column call_key text,
    -- The arguments that a person wants instead.
    add column edited jsonb,
    -- What is decided at the end of its time; the step says so without.
    add column on_timeout text check (on_timeout in ('reject', 'approve', 'escalate')),
    -- When anybody may decide, where nobody has.
    add column escalates_at timestamptz,
    -- Of how much of its time people were reminded, in percent.
    add column reminded smallint not null default 0;
create index approvals_call on approvals (run_id, call_key, id) where call_key is not null;
create index approvals_waiting on approvals (expires_at) where status = 'pending';
-- A person has let the run begin to have effects.
alter table runs add column reviewed boolean not null default false;
