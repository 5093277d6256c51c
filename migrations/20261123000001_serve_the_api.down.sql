-- Roles stay: other databases of the server may use them.
do $$
declare
    one record;
begin
    for one in select tablename, policyname from pg_policies where schemaname = current_schema() loop
        execute format('drop policy %I on %I', one.policyname, one.tablename);
        execute format('alter table %I no force row level security', one.tablename);
        execute format('alter table %I disable row level security', one.tablename);
    end loop;
    for one in select unnest(array['capx_api', 'capx_system']) as rolname loop
        execute format('revoke all on all tables in schema %I from %I', current_schema(), one.rolname);
        execute format('revoke all on all sequences in schema %I from %I', current_schema(), one.rolname);
        execute format('revoke usage on schema %I from %I', current_schema(), one.rolname);
    end loop;
end $$;
alter table approvals drop constraint approvals_gate, add constraint approvals_gate unique (company_id, run_id, step);
drop table tiers, event_marks, run_totals, run_deltas, cost_totals, cost_rollups, cost_deltas, ledger, tasks, idempotency_keys;
drop index jobs_parked;
drop index events_agent;
drop index events_rare;
alter table events drop column rare_kind, drop column agent;
drop index playbooks_by_id;
drop index runs_open, runs_unsuccessful, approvals_status;
alter table agents drop constraint config_size;
alter table companies drop constraint config_size;
alter table playbook_versions drop column step_count;
alter table companies drop column paused_at, drop column stopped_at;
alter table agents drop column heartbeat_count, drop column last_heartbeat_at;
alter table accounts
    drop column rate_per_minute, drop column burst_per_second, drop column concurrent,
    drop column minute_tokens, drop column second_tokens, drop column metered_at, drop column slots;
alter table accounts reset (fillfactor);
