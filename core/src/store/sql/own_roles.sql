-- Since PostgreSQL 16 whoever makes a role may give it to others, and is not one of them: the migrations,
-- which act as capx_system, need to be.
do $$
declare
    wanted text;
    may boolean;
begin
    if current_setting('server_version_num')::int < 160000 then
        return;
    end if;
    foreach wanted in array array['capx_api', 'capx_system'] loop
        if not exists (select from pg_roles where rolname = wanted) then
            begin
                execute format('create role %I nologin nobypassrls', wanted);
            exception when duplicate_object or unique_violation or insufficient_privilege then
                null;
            end;
        end if;
        continue when not exists (select from pg_roles where rolname = wanted);
        execute format('select pg_has_role(current_user, %L, ''set'') and pg_has_role(current_user, %L, ''usage'')', wanted, wanted) into may;
        if not may then
            begin
                execute format('grant %I to %I with inherit true, set true', wanted, current_user);
            exception when insufficient_privilege then
                raise exception 'the role % exists, and % may neither be it nor have its rights', wanted, current_user
                    using hint = format('let an administrator run: grant %I to %I with inherit true, set true', wanted, current_user);
            end;
        end if;
    end loop;
end $$;
