drop table company_secrets;
