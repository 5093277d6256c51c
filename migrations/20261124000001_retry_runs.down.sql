drop index dead_letters_ref;
delete from approvals a using approvals later
    where later.run_id = a.run_id and later.step = a.step and later.id > a.id;
drop index approvals_run;
drop index approvals_gate;
alter table approvals add constraint approvals_gate unique (run_id, step);
alter table runs drop column replay_of;
drop trigger runs_transitions on runs;
create trigger runs_transitions before update on runs for each row
    when (
        old.status in ('completed', 'failed', 'cancelled')
        or (new.status = 'queued' and old.status <> 'queued')
        or (new.status = 'completed' and old.status <> 'running')
    )
    execute function refuse_transition();
