drop trigger runs_transitions on runs;
create trigger runs_transitions before update on runs for each row
    when (
        old.status in ('completed', 'cancelled')
        or (old.status = 'failed' and new.status not in ('running', 'suspended'))
        or (new.status = 'queued' and old.status <> 'queued')
        or (new.status = 'completed' and old.status <> 'running')
    )
    execute function refuse_transition();
drop index agents_short;
drop index runs_of_agents;
alter table runs drop column root_id;
alter table journal drop column category;
alter table journal drop column payer;
alter table journal drop column directive_id;
alter table ledger drop constraint ledger_nanos_check;
-- Corrections stay, so the older check holds for new entries only.
alter table ledger add constraint ledger_nanos_check check (nanos >= 0) not valid;
alter table ledger drop column unheard;
