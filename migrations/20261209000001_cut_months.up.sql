-- History is cut into months by the times that its ids begin with: what is old is deleted from one
-- month, which is dropped, as a file, once it is empty. An id is made by whoever writes: one whose
-- clock is off still finds a part, since the first and the last have no end.
--
-- First the tables are had, or the others that use them and this would wait for each other.
do $$
begin
    perform set_config('lock_timeout', '500ms', true);
    for attempt in 1..120 loop
        begin
            lock table events, deliveries, delivery_attempts in access exclusive mode;
            exit;
        exception when lock_not_available or deadlock_detected then
            if attempt = 120 then
                raise;
            end if;
            perform pg_sleep(random());
        end;
    end loop;
    perform set_config('lock_timeout', '0', true);
    if has_schema_privilege('capx_api', current_schema(), 'create') then
        raise warning 'capx_api may create objects in the schema %, as in databases that were upgraded from PostgreSQL 14 or older: run "revoke create on schema % from public"', current_schema(), current_schema();
    end if;
end $$;

create function least_id(at timestamptz) returns uuid language sql immutable parallel safe as $$
    select (lpad(to_hex(greatest((extract(epoch from at) * 1000::numeric)::bigint, 0)), 12, '0') || repeat('0', 20))::uuid
$$;
create function time_of_id(id uuid) returns timestamptz language sql immutable parallel safe as $$
    select to_timestamp(('x' || left(replace(id::text, '-', ''), 12))::bit(48)::bigint / 1000.0)
$$;

-- The parts of each table, from one id until another.
create table months (
    whole text not null,
    part text not null,
    from_id uuid,
    until_id uuid,
    primary key (whole, part)
);
grant select on months to capx_system;

-- By which column a table is cut.
create function month_key(whole text) returns text language sql immutable as $$
    select case whole when 'delivery_attempts' then 'delivery_id' else 'id' end
$$;
-- A table as another is, with what is said of its rows by the table and not by its columns. Nobody but
-- the owner sees anything in it by its name, past the rules of the whole.
create function month_like(part text, model text) returns void language plpgsql as $$
declare
    options text;
begin
    select ' with (' || pg_catalog.array_to_string(c.reloptions, ', ') || ')' into options from pg_class c where c.oid = model::regclass;
    execute format('create table %I (like %I including all)', part, model) || coalesce(options, '');
    execute format('revoke all on %I from capx_api, capx_system', part);
    execute format('alter table %I enable row level security', part);
end $$;
-- Moves the rows of one part that belong into another.
create function month_move(of_whole text, from_part text, to_part text, from_id uuid, until_id uuid) returns void language plpgsql as $$
declare
    columns text;
begin
    select string_agg(quote_ident(a.attname), ', ' order by a.attnum) into columns from pg_attribute a
    where a.attrelid = from_part::regclass and a.attnum > 0 and not a.attisdropped and a.attgenerated = '';
    execute format(
        'with moved as (delete from %1$I where %2$I >= %3$L and %2$I < %4$L returning *) insert into %5$I (%6$s) select %6$s from moved',
        from_part, month_key(of_whole), from_id, until_id, to_part, columns
    );
end $$;

-- Who may do what with a table as a whole.
create function month_wall(whole text) returns void language plpgsql as $$
declare
    owner text := case whole when 'events' then 'companies' else 'webhooks' end;
    owned_by text := case whole when 'events' then 'company_id' else 'webhook_id' end;
begin
    execute format('grant select, insert, update, delete on %I to capx_api, capx_system', whole);
    execute format('alter table %I enable row level security', whole);
    execute format('alter table %I force row level security', whole);
    execute format('create policy everything on %I to capx_system using (true) with check (true)', whole);
    execute format(
        'create policy tenant on %1$I to capx_api using (exists (select from %2$I o where o.id = %1$I.%3$I))',
        whole, owner, owned_by
    );
end $$;

-- Makes a table's months up to so long ahead of now, off its far end, which is empty but for what
-- somebody wrote whose clock is wrong. Whoever uses the table waits for it, and it waits for them
-- half a second: then it fails, to be tried again.
create function make_months(of_whole text, ahead interval) returns integer language plpgsql
    security definer set lock_timeout = '500ms' as $$
declare
    far text := of_whole || '_far';
    next timestamptz;
    until timestamptz;
    name text;
    made integer := 0;
begin
    select time_of_id(m.from_id) into strict next from months m where m.whole = of_whole and m.until_id is null for update;
    if ahead > interval '1 year' then
        raise exception 'months are made up to a year ahead';
    end if;
    if next >= now() + ahead then
        return 0;
    end if;
    execute format('alter table %I detach partition %I', of_whole, far);
    while next < now() + ahead loop
        until := (next at time zone 'utc' + interval '1 month') at time zone 'utc';
        name := of_whole || '_' || to_char(next at time zone 'utc', 'YYYYMM');
        perform month_like(name, of_whole || '_past');
        perform month_move(of_whole, far, name, least_id(next), least_id(until));
        execute format('alter table %I attach partition %I for values from (%L) to (%L)', of_whole, name, least_id(next), least_id(until));
        insert into months (whole, part, from_id, until_id) values (of_whole, name, least_id(next), least_id(until));
        next := until;
        made := made + 1;
    end loop;
    execute format('alter table %I attach partition %I for values from (%L) to (maxvalue)', of_whole, far, least_id(next));
    update months set from_id = least_id(next) where whole = of_whole and until_id is null;
    return made;
end $$;

-- Drops the oldest month of a table, if it ended a week ago and is empty; the past reaches up to the
-- next one. Says which. Both are looked through while whoever uses the table waits: not if that takes
-- long, as it would until a vacuum has made them small.
create function drop_month(of_whole text) returns text language plpgsql
    security definer set lock_timeout = '500ms' set enable_seqscan = on as $$
declare
    past text := of_whole || '_past';
    small constant bigint := 64 * 1024 * 1024;
    month months;
    is_used boolean;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'whether a month is empty is seen by what is committed: this needs the isolation level "read committed"';
    end if;
    select m.* into month from months m
    join months p on p.whole = of_whole and p.part = past and p.until_id = m.from_id
    where m.whole = of_whole and m.until_id < least_id(now() - interval '7 days');
    if not found or pg_relation_size(month.part::regclass) > small or pg_relation_size(past::regclass) > small then
        return null;
    end if;
    execute format('select exists (select from %I)', month.part) into is_used;
    if is_used then
        return null;
    end if;
    -- From here on nobody writes: whoever does has the whole.
    execute format('lock table only %I in access exclusive mode', of_whole);
    execute format('select exists (select from %I)', month.part) into is_used;
    if is_used then
        return null;
    end if;
    execute format('alter table %I detach partition %I', of_whole, month.part);
    execute format('drop table %I', month.part);
    execute format('alter table %I detach partition %I', of_whole, past);
    execute format('alter table %I attach partition %I for values from (minvalue) to (%L)', of_whole, past, month.until_id);
    delete from months where whole = of_whole and part = month.part;
    update months set until_id = month.until_id where whole = of_whole and part = past;
    return month.part;
end $$;

-- With the rights of the tables' owner, for the role of workers alone, and not by names that it makes up.
do $$
declare
    made text;
begin
    foreach made in array array['make_months(text, interval)', 'drop_month(text)'] loop
        execute format('alter function %s set search_path = %I, pg_temp', made, current_schema());
        execute format('revoke execute on function %s from public', made);
        execute format('grant execute on function %s to capx_system', made);
    end loop;
end $$;

-- Until now that no number was given to two events of a run was looked after by a unique index too. No
-- index is unique over months unless it holds what they are cut by; the run's row, which gives the
-- number out, is locked by whoever takes one.
drop index events_run;
create index events_run on events (company_id, run_id, seq) where run_id is not null;

do $$
declare
    whole text;
    past text;
    i record;
    is_used boolean;
    first timestamptz;
begin
    foreach whole in array array['events', 'deliveries', 'delivery_attempts'] loop
        past := whole || '_past';
        -- What there is goes on as the past, up to the next month; its owner sees it.
        execute format('alter table %I no force row level security', whole);
        execute format('select exists (select from %I)', whole) into is_used;
        first := (date_trunc('month', now() at time zone 'utc') + case when is_used then interval '1 month' else '0' end) at time zone 'utc';
        if whole = 'events' then
            drop trigger events_tell_webhooks on events;
        end if;
        execute format('drop policy everything on %I', whole);
        execute format('drop policy tenant on %I', whole);
        execute format('alter table %I rename to %I', whole, past);
        execute format('revoke all on %I from capx_api, capx_system', past);
        for i in select indexrelid::regclass::text as name from pg_index where indrelid = past::regclass loop
            execute format('alter index %s rename to %I', i.name, 'past_' || i.name);
        end loop;
        execute format('create table %I (like %I including all) partition by range (%I)', whole, past, month_key(whole));
        perform month_wall(whole);
        -- Whom an administrator has let read it.
        for i in
            select a.privilege_type, a.grantee::regrole::text as name
            from pg_class c cross join aclexplode(c.relacl) a
            where c.oid = past::regclass and a.grantee not in (0, c.relowner)
        loop
            execute format('grant %s on %I to %s', i.privilege_type, whole, i.name);
        end loop;
        perform month_like(whole || '_far', past);
        -- What somebody wrote whose clock is wrong.
        perform month_move(whole, past, whole || '_far', least_id(first), 'ffffffff-ffff-ffff-ffff-ffffffffffff');
        execute format('alter table %I attach partition %I for values from (minvalue) to (%L)', whole, past, least_id(first));
        execute format('alter table %I attach partition %I for values from (%L) to (maxvalue)', whole, whole || '_far', least_id(first));
        insert into months (whole, part, until_id) values (whole, past, least_id(first));
        insert into months (whole, part, from_id) values (whole, whole || '_far', least_id(first));
        perform make_months(whole, interval '62 days');
    end loop;
end $$;
create trigger events_tell_webhooks after insert on events
    referencing new table as fresh for each statement execute function tell_webhooks();

-- A row's place names one row within a month, and another in each of the others: a version before this
-- deletes by places, and would delete what is anybody's.
create function refuse_places() returns trigger language plpgsql as $$
begin
    if current_query() ~* 'delete\s+from\s+events\M.*\mctid\M' then
        raise exception 'events are deleted by their keys, since they are cut into months: this needs a newer version of capx';
    end if;
    return null;
end $$;
create trigger events_are_deleted_by_key before delete on events
    for each statement execute function refuse_places();
