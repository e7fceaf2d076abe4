"""Store a dump in S3 under today's name and remove all but the latest: python backup.py FILE PREFIX KEEP"""

import os
import sys
import time

import boto3

path, prefix, keep = sys.argv[1], sys.argv[2], int(sys.argv[3])
bucket, s3 = os.environ["MLFLOW_BUCKET"], boto3.client("s3")
key = f"{prefix}mlflow-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.dump"
s3.upload_file(path, bucket, key)
stored = s3.head_object(Bucket=bucket, Key=key)["ContentLength"]
if stored != os.path.getsize(path):
    sys.exit(f"s3://{bucket}/{key} has {stored} bytes of {os.path.getsize(path)}; no older backup is removed")
pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}mlflow-")
found = sorted(one["Key"] for page in pages for one in page.get("Contents", ()))
for old in found[:-keep]:
    s3.delete_object(Bucket=bucket, Key=old)
print(f"s3://{bucket}/{key}: {stored} bytes; {min(keep, len(found))} backups kept")
