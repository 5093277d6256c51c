do $$
declare
    whole text;
    plain text;
begin
    foreach whole in array array['events', 'deliveries', 'delivery_attempts'] loop
        plain := whole || '_plain';
        execute format('alter table %I no force row level security', whole);
        perform month_like(plain, whole || '_past');
        perform month_move(whole, whole, plain, '00000000-0000-0000-0000-000000000000', 'ffffffff-ffff-ffff-ffff-ffffffffffff');
        execute format('drop table %I cascade', whole);
        execute format('alter table %I rename to %I', plain, whole);
        perform month_wall(whole);
    end loop;
end $$;
create trigger events_tell_webhooks after insert on events
    referencing new table as fresh for each statement execute function tell_webhooks();
-- As they were called before.
do $$
declare
    i record;
begin
    for i in
        select indexrelid::regclass::text as index, n.name
        from (values
            ('events', '(company_id, run_id, seq)', 'events_run'),
            ('events', '(company_id, rare_kind, xid, id)', 'events_rare'),
            ('events', '(company_id, agent, xid, id)', 'events_agent'),
            ('deliveries', '(webhook_id, id) WHERE', 'deliveries_failed_ones')
        ) as n (whole, columns, name)
        join pg_index x on x.indrelid = n.whole::regclass and position(n.columns in pg_get_indexdef(x.indexrelid)) > 0
    loop
        execute format('alter index %s rename to %I', i.index, i.name);
    end loop;
end $$;
drop index events_run;
create unique index events_run on events (company_id, run_id, seq) where run_id is not null;
drop function refuse_places, drop_month, make_months, month_move, month_like, month_wall, month_key, time_of_id, least_id;
drop table months;
