-- Of runs of a playbook with the same key only so many are under way at once; the
-- others are queued, or whatever the playbook says.
alter table runs add column concurrency_key text;
create index runs_slots on runs (playbook_id, concurrency_key, id)
    where concurrency_key is not null and ended_at is null;

-- Whatever ends a run frees its slot: a job sees who is next.
create function free_slot() returns trigger language plpgsql as $$
begin
    insert into jobs (queue, kind, company_id, ref_id, state) values ('system', 'slot', new.company_id, new.id, 'ready');
    return null;
end $$;
create trigger runs_free_slot after update of status on runs for each row
    when (
        new.concurrency_key is not null and new.status in ('completed', 'failed', 'cancelled')
        and old.status is distinct from new.status
    )
    execute function free_slot();
