-- What a call may have cost whose answer nobody heard is booked at its worst, as an entry of its
-- own kind; where the call is repeated under its key and answered, a correction takes it back.
alter table ledger add column unheard boolean not null default false;
create index ledger_unheard on ledger (company_id, at) where unheard;
alter table ledger drop constraint ledger_nanos_check;
alter table ledger add constraint ledger_nanos_check check (nanos >= 0 or unheard);
-- The directive that the call is counted for, as it was when it was begun.
alter table journal add column directive_id uuid;
-- Who is asked, where the other side knows a call by its key: only they are paid once for the same.
alter table journal add column payer text;
-- What it is booked as.
alter table journal add column category text not null default 'inference';
-- The directive that a run serves: that of whoever has let it begin.
alter table runs add column root_id uuid;
update runs r set root_id = t.root_id
from tasks t
where t.company_id = r.company_id and t.run_id = r.id and t.root_id is not null
    and r.beat_of is not null and r.status in ('queued', 'running', 'suspended');
update journal j set directive_id = t.root_id
from tasks t
where t.company_id = j.company_id and t.run_id = j.run_id and t.root_id is not null and j.reserved_nanos + j.kept_nanos > 0;
-- What is left of the budgets' money that was kept apart until now is looked at like the rest.
update journal set reserved_nanos = reserved_nanos + kept_nanos, kept_nanos = 0 where kept_nanos > 0;
-- Those that agents have begun, which may be so many at once.
create index runs_of_agents on runs (company_id) where trigger = 'agent' and ended_at is null;
-- The agents whose money comes back.
create index agents_short on agents (paused_until) where paused_by = 'budget' and paused_until is not null;
-- Money of which nobody has heard is booked on runs that are over, too; nothing else of them changes.
drop trigger runs_transitions on runs;
create trigger runs_transitions before update on runs for each row
    when (
        (old.status in ('completed', 'cancelled') and (new.status <> old.status or new.cost_nanos = old.cost_nanos))
        or (
            old.status = 'failed' and new.status not in ('running', 'suspended')
            and (new.status <> old.status or new.cost_nanos = old.cost_nanos)
        )
        or (new.status = 'queued' and old.status <> 'queued')
        or (new.status = 'completed' and old.status not in ('running', 'completed'))
    )
    execute function refuse_transition();
